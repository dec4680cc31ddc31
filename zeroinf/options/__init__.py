"""Options of a run or a plan: their definition, what contradicts itself among them, and the plan that they lead to.

In: flags, keywords of the Python API and the machine. Out: a `planner.plan.Plan`. It loads no model and knows nothing
of results.
"""
