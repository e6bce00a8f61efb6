"""The only place that knows dagster: assets, checks, partitions, jobs and resources over plain library functions."""
