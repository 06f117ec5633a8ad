"""verl's Parquet, with the reward fields that verl's own scorers read, from data sets that are on disk.

:mod:`.places` finds the files of each split, :mod:`.reading` reads them, :mod:`.answers` finds a row's final answer,
:mod:`.tasks` says what a row of each data set becomes, :mod:`.converting` and :mod:`.writing` do it. Nothing is
downloaded, and neither verl, torch nor ``datasets`` is imported.
"""
