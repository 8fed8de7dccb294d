"""More than one GPU, more than one node: ``engine: {kind: cohort, workers: N}``.

Each of N workers is a Ray actor with a base model of its own, on a GPU of its own or, without GPUs,
on its share of the CPU's threads. ``shards`` divides a round's clients among them by predicted
cost, ``worker`` trains a shard by ``CohortFederation`` as one process would, ``wire`` is what
crosses between them, ``pool`` hands out shards and replaces workers that die, ``ray_pool`` does so
with Ray, ``federation`` is the seam to the round loop. For a linear strategy a worker checks and
averages its replies itself: one row comes back, whatever the number of clients.

**A cluster.** Without more, a run starts a Ray of its own on this machine and ends it. To use
several machines, join them first, and tell the run where the cluster is::

    machine-0$ ray start --head --port=6379
    machine-1$ ray start --address=machine-0:6379
    machine-0$ RAY_ADDRESS=machine-0:6379 fedpeft run recipe.yaml engine.workers=16

All machines need the same Python, fedpeft and dependencies (and the module of a strategy of your
own), and find model and data under the names that the recipe gives: a shared folder, or each its
own copy. Workers compare digests of base model, adapter and data with the run's own and refuse to
train on others. The run itself needs a GPU where its workers use GPUs: it evaluates and exports.
It writes its folder and checkpoints; workers write nothing. Baselines are trained in the run's own
process. Ray's port must not be reachable by others: whoever reaches it can run code, for processes
of one user talk to each other in cloudpickle. Nothing that comes from a real client passes here.
"""
