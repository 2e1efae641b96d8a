"""How the objects of the package look to a person: text, HTML for notebooks, and pictures.

The modules of this room know numbers, tables and axes. `text` and `html` import nothing else of the package;
matplotlib is imported when a picture is drawn.
"""
