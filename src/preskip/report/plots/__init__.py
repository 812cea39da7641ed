"""Plots of the report as Vega-Lite specifications: pure functions from records to dictionaries.

Colours are not in the specifications: they name the ranges "category" (arms) and "ordinal" (verdicts), which the page
fills from its style sheet, so the same plot serves the light and the dark page, and paper.
"""
