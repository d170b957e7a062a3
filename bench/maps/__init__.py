"""The maps: figures of a results file, their numbers, the page around them, and the advice data.

::

    results.py  ->  table.py     rows by what they are about
                       |
                       v
    normalizations, backends, libraries, choices, roofline, accuracy     each yields `Figure`s
                       |                (drawn with style.py and heat.py)
                       v
    page.py, explore.py, advice.py       index.md, explore.html, the advice data in the package
"""
