from lrc import main

main()
