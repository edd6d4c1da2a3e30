"""The report of a run: from the traces of its ranks to a page that explains where time went.

```text
files -> Run (ranks of one start, clocks aligned) -> Figures (split, buckets, wire, ranks, steps)
      -> findings in words, sections with SVG, one HTML page; or a difference of two runs
```

All of it is functions from values to values, but for `run.load`, which reads, and what writes the
page. It knows nothing of an engine. A time is in milliseconds.
"""
