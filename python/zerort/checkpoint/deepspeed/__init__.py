"""DeepSpeed's checkpoints: read once, to move a run that is under way.

`files` reads what lies in a folder without running any of it, `layout` knows where a parameter's
elements lie at each stage, `convert` writes them as a checkpoint of this program's.
"""
