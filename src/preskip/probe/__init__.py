"""The probe: insert, train frozen, evaluate, compare; the orchestration of one run."""
