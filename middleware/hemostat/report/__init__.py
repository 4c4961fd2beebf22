"""The parts of reports: figures, plots, the page, progress, and files that do not replace others by mistake."""
