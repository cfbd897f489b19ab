"""Runnable agents: dataset, tool and grader server, job, expected result. Not part of the installed package."""
