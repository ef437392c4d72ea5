"""Damaged and hostile files, in bulk: each gives the right data or one typed error.

`mutate` damages sound files, `targets/` says for each kind of file what is right, `trial` tries
mutants in a process of their own, and `corpus/TARGET/` keeps the files that once went wrong.
"""
