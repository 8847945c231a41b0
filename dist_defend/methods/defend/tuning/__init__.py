"""Parts of defences that train the suspect further on the defender's images: ft, ft_sam, nad, fp, nc, sau."""
