"""Where guesses come from: each module is one `spotserve.speculation.drafter.Drafter`."""
