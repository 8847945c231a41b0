"""The encoder methods as their published code computes them, needless work included.

Written by us from the papers and from what jinyuan-jia/BadEncoder and wssun/MIMIC do; only the bench and the tests
import it. It is what the package's numbers are checked against and what its speed is measured against.
"""
