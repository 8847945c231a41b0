"""ABD (Hong et al., ICML 2023): what keeps a backdoor out of a student that is distilled without the teacher's data.

The shuffling vaccine (vaccine.py) keeps synthetic images away from trigger-like ones; self-retrospection
(retrospection.py) unlearns what the teacher's labels taught nevertheless. Both plug into zskt, cmi and ood.
"""
