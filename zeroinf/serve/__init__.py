"""`zeroinf serve`: HTTP in front of a loaded model, with OpenAI's requests, files and batches, and a page to look at.

Here live the routes, the limits and keys of a server, batches and their files on disk, and servers that have names.
What a request means is read by `zeroinf.jobs`; how it runs is the business of `zeroinf.service`. Nothing below
`zeroinf.cli` but this package imports FastAPI, uvicorn or prometheus-client, which are the extra `[serve]`.
"""
