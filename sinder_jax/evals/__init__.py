"""Downstream tasks that tell what a repair is worth, as pure functions of arrays.

    model, images --features--> class tokens, patches --knn | linear | ...--> metrics

No function here touches a file: `experiments.evaluate` reads the data, keeps features
and heads on the disk, and writes the results.
"""
