"""The parts of the main job, ``python -m cpunorm``.

cli.py          arguments, the parts in turn, the exit code
checks.py       (b) every operation against the oracle
pipeline.py     (c) a small network on the images of data/
timing.py       (d) times by shape, layout and backend
formulas.py     plain NumPy, for (c) and (d)
report.py       all of it as text          progress.py     while it runs
neighbours.py   whether other programs spoilt the times
make_data.py    made data/images.npz; not needed to run
"""
