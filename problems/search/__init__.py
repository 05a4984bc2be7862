"""The search phase: its options, engine, students and early stop."""
