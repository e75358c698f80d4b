"""The main job, end to end: a text encoder swapped, a real corpus encoded, its queries answered from binary codes.

corpus.py    the text-to-code pairs of this machine's own Python standard library
encoders.py  the unmodified model, the swapped one, and its exits
searches.py  the ways to search, and how good their answers are
report.py    the table and the plots
run.py       the order of things
"""
