"""What defences share that go on training the suspect on the defender's images: ft, ft_sam, nad, fp, nc, sau."""
