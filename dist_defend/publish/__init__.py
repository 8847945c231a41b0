"""Models for others: what ``dist-defend export`` writes and ``dist-defend push`` sends."""
