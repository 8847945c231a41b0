"""What methods that prune neurons are made from: masks, stops, the choice of a stop, its outcome, their options.

A neuron is a channel of a batch norm. A method says how it scores one, and its Config which stops there are.
"""
