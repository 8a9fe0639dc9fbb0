"""Pipeline schedules as data, the passes and checks over them, and the executor that runs them."""
