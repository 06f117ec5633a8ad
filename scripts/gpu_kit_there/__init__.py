"""Take in, join and install a carry kit on a machine without a network.

The kit is what ``gpu_kit.py pack`` made elsewhere: ``manifest.json`` and pieces ``kit-000.bin`` and so on. This package
travels with them as one file, ``gpu_kit_there.pyz``, and needs Python 3.10 and its standard library alone::

    python3 gpu_kit_there.pyz collect ARRIVED... --kit KIT    # as often as something arrives, in any order
    python3 gpu_kit_there.pyz status --kit KIT
    python3 gpu_kit_there.pyz join --kit KIT
    python3 gpu_kit_there.pyz install --kit KIT               # a venv KIT/venv over the torch that is there

Exit codes: 0 done (collect: complete), 1 the machine failed (a full disk, an import), 2 a wrong input, 3 pieces are
missing, 130 interrupted.
"""
