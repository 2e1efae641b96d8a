"""Display of the objects of the package: text, HTML for notebooks, and figures.

`text` and `html` import nothing else of the package; matplotlib is imported when a figure is drawn.
"""
