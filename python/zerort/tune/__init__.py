"""What a run's wire and backward are like, and the configuration that suits them: measured on the
engine's own groups, predicted by the core's cost model.
"""
