"""A job: requests in, results out.

Here live the input formats, the queue from which every rank draws its own stream, the ordered output, and the function
that carries one run from request to report. How tokens come about is not known here.
"""
