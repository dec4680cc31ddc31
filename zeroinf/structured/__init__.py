"""Structured answers: formats that a completion must have (JSON, a JSON schema, a regex, a choice), and the grammars
that say, token by token, how an answer in such a format may go on. Grammars are llguidance's, in the extra
`[structured]`.

Rows, passes and scores are `zeroinf.generation`'s, which asks here for masks.
"""
