"""ABD (Hong et al., ICML 2023): defences for a student that is distilled without the teacher's training data.

The shuffling vaccine (vaccine.py) keeps synthetic images away from trigger-like ones; self-retrospection
(retrospection.py) unlearns the backdoor that the teacher's outputs passed on. zskt, cmi and ood can use both.
"""
