"""The teacher, its kept answers, and the objective that a student is trained for."""
