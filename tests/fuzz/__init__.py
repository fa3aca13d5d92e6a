"""Random input, made from a seed: whatever comes in, a good result or a named error comes out.

An input is JSON, of which a file, a prompt or a server is made, so that what is found stays small:
`found/` keeps such cases for ever.
"""
