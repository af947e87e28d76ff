"""Prints the command line that starts this program again, as a run's heartbeat does."""

from experiments.run import heartbeat

if __name__ == "__main__":
    print(heartbeat.own_command())
