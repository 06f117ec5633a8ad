"""Proof that FP16 works on this machine with these versions: stages that gather facts, and rows that judge them.

A stage (``*_stage.py``) runs in a process of its own and writes facts, plain types; the judgement of facts
(``*_rows.py``) is pure.
"""
