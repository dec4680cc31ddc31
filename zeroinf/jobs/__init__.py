"""Job files: requests read from files of many formats, and results written so that no crash loses any.

In: paths and bytes. Out: requests, a journal, and output files. It knows no model, no plan and no GPU.
"""
