"""`zerort doctor`: what of a machine, an environment and a job decides whether a run starts and how
fast it is. Each check is a function from a `Machine` to its findings.

What this guarantees: it ends within its time-outs, leaves no process behind, and a check that
raises is a finding. What it does not do: it changes nothing, and a run may still fail.
"""
