"""Who watches a run from outside: log lines, metrics for Prometheus, what its folder says of it.

Nothing here changes a result. ``watching`` is what a server's process calls, ``Metrics``
answers a scrape on loopback, ``Progress`` reads the run folder of any run.
"""
