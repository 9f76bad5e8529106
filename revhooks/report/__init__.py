"""Reports: they take records and show them; torch is not imported here.

What a report says: `advice` (the answer), `columns` (the what-if table), `grouping` (modules), `facts` (the other figures),
`selection` (what is drawn). How it is shown: `tables`, with `fitting` and `timeline`, in a terminal; `html`, with `page`; `svg`;
`trace`; `flamegraph`.
"""
