"""The encoder methods as their published code computes them, needless work included.

Written by us from the papers and from what jinyuan-jia/BadEncoder and wssun/MIMIC do; nothing here is imported by the
package. It is what the package's numbers are checked against and what its speed is measured against.
"""
