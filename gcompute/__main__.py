from gcompute.cli.main import main

main()
