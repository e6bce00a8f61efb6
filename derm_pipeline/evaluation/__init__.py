"""Is the synthetic data good, is it new, and whom does training on it help?

`fidelity` compares feature distributions, `memorisation` looks for copies of training images, `groups` gives per-group
and worst-group figures of classifiers; `features` and `classifiers` bring the networks, `report` the page for people.
"""
