"""Parts of methods that prune neurons: masks, the stops of a sweep, the choice of a stop, the outcome, options.

A neuron is a channel of a batch norm (fp: an input of a linear layer). A stop is a number of neurons that are pruned,
those of lowest score. A method defines the scores, and its Config the stops.
"""
