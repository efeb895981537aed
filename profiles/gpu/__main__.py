"""python -m profiles.gpu"""

from profiles.gpu.suite import main

if __name__ == "__main__":
    main()
