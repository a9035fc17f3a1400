"""Pipeline parallelism: schedules as data, their checks, costs and pictures, and one program that runs any of them."""
