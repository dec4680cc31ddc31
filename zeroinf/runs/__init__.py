"""Runs: a plan and the requests of a job executed from start to finish, on every rank.

In: options and requests. Out: results, handed to `zeroinf.jobs` to be saved, and a report. Everything about signals,
ranks and the end of a run lives here; formats of files do not.
"""
