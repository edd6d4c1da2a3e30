"""The report of a run: from the traces of its ranks to a page that explains where time went.

It reads files and writes one; it knows nothing of an engine.
"""
