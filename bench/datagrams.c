/* Datagrams for the benchmark: an echo server, and a client that counts round trips.
 *
 *   datagrams echo HOST
 *       echoes on a free port of HOST, which it prints
 *   datagrams load HOST PORT FLOWS IN_FLIGHT SIZE SECONDS
 *       closed loop: each of FLOWS sockets keeps IN_FLIGHT datagrams pending.
 *       Warms up first and prints "ready"; then does so for SECONDS for each line of
 *       its input, until that ends
 *   datagrams turns HOST PORT FLOWS AT_ONCE BURST SIZE SECONDS
 *       closed loop: AT_ONCE of FLOWS sockets have BURST datagrams pending.  When all of
 *       one flow's are back, the next flow sends a burst.  Begins as a load does
 *   datagrams new HOST PORT FLOWS SIZE
 *       FLOWS new sockets with one round trip each, few at a time, for each line of its
 *       input, until that ends; once before it prints "ready"
 *   datagrams rate HOST PORT FLOWS RATE SIZE SECONDS
 *       open loop: RATE datagrams a second, the flows in turn
 *
 * HOST is an IPv4 address.  The last four print "sent received seconds", those with
 * an input for each of its lines.  Everything is sent and received in batches (sendmmsg,
 * recvmmsg), so that neither end limits the relay.  Written in C because in Python the ends would cost more than the relay.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, ROOM = 2048, AHEAD = 32 };

/* Seconds of a load that are left out. */
static const double WARM_UP = 0.2;

static char data[BATCH][ROOM];
static struct iovec parts[BATCH];
static struct sockaddr_in names[BATCH];
static struct mmsghdr messages[BATCH];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void prepare(int count, size_t size, int named) {
    for (int i = 0; i < count; i++) {
        parts[i] = (struct iovec){data[i], size};
        memset(&messages[i], 0, sizeof messages[i]);
        messages[i].msg_hdr.msg_iov = &parts[i];
        messages[i].msg_hdr.msg_iovlen = 1;
        if (named) {
            messages[i].msg_hdr.msg_name = &names[i];
            messages[i].msg_hdr.msg_namelen = sizeof names[i];
        }
    }
}

static int open_socket(int blocking) {
    int fd = socket(AF_INET, SOCK_DGRAM | (blocking ? 0 : SOCK_NONBLOCK), 0);
    int room = 8 << 20;
    if (fd < 0)
        fail("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    return fd;
}

static struct sockaddr_in address_of(const char *host, int port) {
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host, &name.sin_addr) != 1) {
        fprintf(stderr, "%s is no IPv4 address\n", host);
        exit(2);
    }
    return name;
}

static void echo(const char *host) {
    int fd = open_socket(1);
    struct sockaddr_in here = address_of(host, 0);
    socklen_t length = sizeof here;
    if (bind(fd, (struct sockaddr *)&here, sizeof here) < 0)
        fail("bind");
    if (getsockname(fd, (struct sockaddr *)&here, &length) < 0)
        fail("getsockname");
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    for (;;) {
        prepare(BATCH, ROOM, 1);
        int count = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
        for (int i = 0; i < count; i++)
            parts[i].iov_len = messages[i].msg_len;
        for (int sent = 0; sent < count;) {
            int some = sendmmsg(fd, messages + sent, count - sent, 0);
            /* A flow that has ended refuses (ICMP); go on with the next one. */
            sent += some > 0 ? some : 1;
        }
    }
}

static int *open_flows(struct sockaddr_in relay, int flows, int epoll) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    int *fds = calloc(flows, sizeof *fds);
    for (int i = 0; i < flows; i++) {
        fds[i] = open_socket(0);
        if (connect(fds[i], (struct sockaddr *)&relay, sizeof relay) < 0)
            fail("connect");
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event) < 0)
            fail("epoll_ctl");
    }
    return fds;
}

static long send_some(int fd, int count, size_t size) {
    long sent = 0;
    while (sent < count) {
        int most = count - sent < BATCH ? count - sent : BATCH;
        prepare(most, size, 0);
        int some = sendmmsg(fd, messages, most, 0);
        if (some <= 0)
            break;
        sent += some;
    }
    return sent;
}

static int receive_some(int fd) {
    prepare(BATCH, ROOM, 0);
    int count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
    return count > 0 ? count : 0;
}

/* A datagram on each flow, few at a time: opening a flow is slow, and many datagrams at
 * once would be lost. */
static void begin_flows(int epoll, int *fds, int flows, size_t size) {
    struct epoll_event events[AHEAD];
    int sent = 0, received = 0;
    while (received < flows) {
        for (; sent < flows && sent - received < AHEAD; sent++)
            send_some(fds[sent], 1, size);
        int count = epoll_wait(epoll, events, AHEAD, 1000);
        if (count <= 0) {
            fprintf(stderr, "%d of %d flows were answered\n", received, flows);
            exit(1);
        }
        for (int i = 0; i < count; i++)
            received += receive_some(events[i].data.fd);
    }
}

struct moved {
    long sent, received;
    double seconds;
};

/* A closed loop: at_once of the flows have so many datagrams pending.  When some come
 * back, as many of the same flow are sent; with turns, when all of one flow's are back,
 * the next flow sends a burst. */
struct loop {
    int epoll, *fds, flows, at_once, burst, in_turn;
    size_t size;
};

/* Pending datagrams, by the flow's descriptor. */
static int *nothing_due(const int *fds, int flows) {
    int most = 0;
    for (int i = 0; i < flows; i++)
        most = fds[i] > most ? fds[i] : most;
    return calloc(most + 1, sizeof(int));
}

static struct moved round_trips(const struct loop *loop, double seconds) {
    struct epoll_event events[256];
    long sent = 0, received = 0, next = 0;
    double begin = now(), end = begin + seconds, quiet = begin;
    int *fds = loop->fds, *due = nothing_due(fds, loop->flows);
    for (; next < loop->at_once; next++)
        sent += due[fds[next]] = send_some(fds[next], loop->burst, loop->size);
    while (received < sent) {
        int count = epoll_wait(loop->epoll, events, 256, 50);
        double time = now();
        if (count > 0)
            quiet = time;
        else if (time - quiet > 0.5)
            break; /* What is still pending is lost. */
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd, follow = receive_some(fd);
            received += follow;
            due[fd] -= follow;
            if (time >= end || (loop->in_turn && due[fd] > 0))
                continue;
            if (loop->in_turn) {
                /* The flow that has finished has none pending, even if all others have. */
                while (due[fds[next % loop->flows]] > 0)
                    next++;
                fd = fds[next++ % loop->flows];
                follow = loop->burst;
            }
            long more = send_some(fd, follow, loop->size);
            due[fd] += more;
            sent += more;
        }
    }
    free(due);
    return (struct moved){sent, received, quiet - begin};
}

static int load(struct sockaddr_in relay, struct loop loop, double seconds) {
    loop.epoll = epoll_create1(0);
    loop.fds = open_flows(relay, loop.flows, loop.epoll);
    begin_flows(loop.epoll, loop.fds, loop.flows, loop.size);
    round_trips(&loop, WARM_UP);
    puts("ready");
    fflush(stdout);
    for (int character; (character = getchar()) != EOF;) {
        if (character != '\n')
            continue;
        struct moved moved = round_trips(&loop, seconds);
        printf("%ld %ld %f\n", moved.sent, moved.received, moved.seconds);
        fflush(stdout);
    }
    return 0;
}

/* New flows, of which each has one round trip. */
static double new_flows(struct sockaddr_in relay, int flows, size_t size) {
    double begin = now();
    int epoll = epoll_create1(0), *fds = open_flows(relay, flows, epoll);
    begin_flows(epoll, fds, flows, size);
    for (int i = 0; i < flows; i++)
        close(fds[i]);
    close(epoll);
    free(fds);
    return now() - begin;
}

static int opening(struct sockaddr_in relay, int flows, size_t size) {
    new_flows(relay, flows, size);
    puts("ready");
    fflush(stdout);
    for (int character; (character = getchar()) != EOF;) {
        if (character != '\n')
            continue;
        printf("%d %d %f\n", flows, flows, new_flows(relay, flows, size));
        fflush(stdout);
    }
    return 0;
}

static int rate(struct sockaddr_in relay, int flows, double rate, size_t size,
                double seconds) {
    int epoll = epoll_create1(0);
    int *fds = open_flows(relay, flows, epoll);
    struct epoll_event events[256];
    long sent = 0, received = 0, next = 0;
    double begin = now(), quiet = begin, last = begin;
    for (;;) {
        double time = now(), passed = time - begin;
        long due = (long)((passed < seconds ? passed : seconds) * rate);
        while (sent < due) {
            if (send_some(fds[next++ % flows], 1, size) != 1)
                fail("send");
            if (++sent == due)
                last = now();
        }
        int count = epoll_wait(epoll, events, 256, 1);
        if (count > 0)
            quiet = now();
        for (int i = 0; i < count; i++)
            received += receive_some(events[i].data.fd);
        if (passed >= seconds && (received >= sent || now() - quiet > 0.5))
            break;
    }
    printf("%ld %ld %f\n", sent, received, last - begin);
    return 0;
}

int main(int argc, char **argv) {
    const char *kind = argc > 2 ? argv[1] : "";
    if (argc == 3 && !strcmp(kind, "echo"))
        echo(argv[2]);
    struct sockaddr_in relay = {0};
    int flows = 0;
    if (argc > 4) {
        relay = address_of(argv[2], atoi(argv[3]));
        flows = atoi(argv[4]);
    }
    if (argc == 8 && atol(argv[6]) <= ROOM && !strcmp(kind, "load")) {
        struct loop all = {.flows = flows, .at_once = flows, .burst = atoi(argv[5]),
                           .size = atol(argv[6])};
        return load(relay, all, atof(argv[7]));
    }
    if (argc == 9 && atol(argv[7]) <= ROOM && !strcmp(kind, "turns") &&
        atoi(argv[5]) <= flows) {
        struct loop some = {.flows = flows, .at_once = atoi(argv[5]),
                            .burst = atoi(argv[6]), .in_turn = 1,
                            .size = atol(argv[7])};
        return load(relay, some, atof(argv[8]));
    }
    if (argc == 6 && atol(argv[5]) <= ROOM && !strcmp(kind, "new"))
        return opening(relay, flows, atol(argv[5]));
    if (argc == 8 && atol(argv[6]) <= ROOM && !strcmp(kind, "rate"))
        return rate(relay, flows, atof(argv[5]), atol(argv[6]), atof(argv[7]));
    fprintf(stderr, "usage: datagrams echo HOST"
                    " | load HOST PORT FLOWS IN_FLIGHT SIZE SECONDS"
                    " | turns HOST PORT FLOWS AT_ONCE BURST SIZE SECONDS"
                    " | new HOST PORT FLOWS SIZE"
                    " | rate HOST PORT FLOWS RATE SIZE SECONDS\n");
    return 2;
}
