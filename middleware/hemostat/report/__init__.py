"""The parts of reports: figures, plots, the page, progress, and files that do not replace others by mistake.

formats        how figures are written, in the terminal and on the page
heat_map       a heat map as SVG text, with the rules of `svg`
page           the HTML page of a report (Jinja2, extra `report`), and the parts that it consists of
progress       progress on standard error
svg            plots as SVG text: no script, no network
written_files  files that a command writes
"""
