"""A plug-in of dist_defend, described in docs/plugins.md and docs/tutorials/add-a-defence.md."""
