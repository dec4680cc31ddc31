"""The command line: one thin file a command.

Here live flags, words and exit codes. No torch, transformers or deepspeed import happens before a command needs it,
and no decision is taken here: a command turns flags into a request, calls one function below, and prints what comes
back.
"""
