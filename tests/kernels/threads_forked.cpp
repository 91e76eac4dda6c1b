// Forks a process whose pool of threads is at work or about to rest. See test_threads.py.

#include "each_once.h"

#include <sys/wait.h>
#include <unistd.h>

int main() {
    for (int i = 0; i < 300; ++i) {
        if (!each_once(30, 5)) return 1;
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            _exit(each_once(30, 4) ? 0 : 1);
        }
        int status = 1;
        waitpid(child, &status, 0);
        if (status != 0) return 1;
    }
    return 0;
}
