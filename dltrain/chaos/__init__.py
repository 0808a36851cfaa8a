"""Faults on purpose: what is drawn (plan), what harms itself (victim), who starts and restarts it (runner), and whether
anything shows afterwards (judge). Nothing outside this package knows of it."""
