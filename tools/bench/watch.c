/* Many observers of one resource of a CoAP server on loopback; prints what they were told, as JSON.
 *
 * Usage: watch [-n OBSERVERS] [-l LOSS] [-d DEAD] [-s SEED] [-t SECONDS] [-q SECONDS]
 *              HOST PORT OPTIONS
 *
 * OPTIONS are those of the registration in hexadecimal digits, Observe included. Each observer has
 * an address of its own in 127.0.0.0/8, or a port of its own at the same one. It is told when a
 * notification of a payload other than that of the registrations came, and its ACK was sent.
 *   -l  per cent of datagrams that are lost, each way; -s says which
 *   -d  per cent of observers that register, and never say anything again
 *   -t  the longest that registering may take, and then telling all the living
 *   -q  how long it goes on after that, to see what comes twice
 *
 * A line is printed when all have registered, one when all the living are told or time is up, and
 * one at the end. A registration that is not answered is an error.
 * Bounded: at most 2^20 observers, 64 registrations in flight, 1,024 bytes of options, 300 s.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CON, NON, ACK, RST, OBSERVE = 6 };
enum { MOST_OBSERVERS = 1 << 20, MOST_SECONDS = 300, MOST_OPTIONS = 1024, DATAGRAM = 2048 };
enum { SOCKETS = 16, WINDOW = 64, BATCH = 64, ATTEMPTS = 20 };
enum { NET = 0x7f010000 }; /* the first address of an observer */
#define NS INT64_C(1000000000)
#define TIMEOUT_NS (NS / 5) /* until a registration is repeated */

struct observer {
    int64_t deadline, told; /* of the registration; of the first ACK that was not lost */
    uint32_t datagrams;     /* so far, both ways: with the seed they say which are lost */
    uint16_t last_id;       /* of a notification of the new state */
    uint8_t attempts;
    bool registered, refused, dead, heard;
};

static struct {
    unsigned observers;
    double loss, dead;
    uint64_t seed;
    int64_t duration, quiet;
} asked = {.observers = 1, .duration = 60 * NS, .quiet = NS / 2};

static struct {
    unsigned registered, refused, living, told, twice, repeated, old, strays, lost;
} counted;

static struct observer *observers;
static int sockets[SOCKETS];
static struct sockaddr_in server;
static uint8_t options[MOST_OPTIONS], before[DATAGRAM]; /* the payload of the registrations */
static size_t options_size, before_size;
static unsigned window[WINDOW], in_flight, next_observer;

static int64_t now_ns(void) /* the clock that files have, too */
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * NS + now.tv_nsec;
}

static double chance(uint64_t index, uint64_t count) /* in per cent, the same for the same seed */
{
    uint64_t x = asked.seed * 0x9e3779b97f4a7c15 ^ (index << 32 | count);
    for (int i = 0; i < 2; i++)
        x = (x ^ x >> 31) * 0xbf58476d1ce4e5b9 + 0x94d049bb133111eb;
    return (double)((x ^ x >> 29) >> 11) * 100 / (double)(UINT64_C(1) << 53);
}

static bool is_lost(unsigned index)
{
    bool lost = chance(index, ++observers[index].datagrams) < asked.loss;
    counted.lost += lost;
    return lost;
}

/* ---- Sending --------------------------------------------------------------------------------- */

static void open_sockets(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET};
    for (int i = 0; i < SOCKETS; i++) {
        int fd = sockets[i] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 3)
            || setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &(int){1}, sizeof(int))
            || setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){1 << 22}, sizeof(int))
            || bind(fd, (struct sockaddr *)&any, sizeof any))
            err(1, "socket");
    }
}

/* Sends a datagram, unless it gets lost. Returns whether it did not. */
static bool post(unsigned index, const void *data, size_t size)
{
    if (is_lost(index))
        return false;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct in_pktinfo))] = {0};
    struct iovec part = {.iov_base = (void *)data, .iov_len = size};
    struct msghdr header = {.msg_name = &server, .msg_namelen = sizeof server, .msg_iov = &part,
                            .msg_iovlen = 1, .msg_control = control,
                            .msg_controllen = sizeof control};
    struct in_pktinfo from = {.ipi_spec_dst.s_addr = htonl(NET + index / SOCKETS)};
    *CMSG_FIRSTHDR(&header) = (struct cmsghdr){
        .cmsg_len = CMSG_LEN(sizeof from), .cmsg_level = IPPROTO_IP, .cmsg_type = IP_PKTINFO};
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&header)), &from, sizeof from);
    while (sendmsg(sockets[index % SOCKETS], &header, 0) < 0)
        if (errno != EINTR && errno != ENOBUFS)
            err(1, "sendmsg");
    return true;
}

static void ask(unsigned index, int64_t now)
{
    struct observer *observer = &observers[index];
    if (observer->attempts++ == ATTEMPTS)
        errx(1, "no answer to a registration, after %u others", counted.registered);
    observer->deadline = now + TIMEOUT_NS;
    uint8_t data[8 + MOST_OPTIONS]
        = {0x44 | CON << 4, 1 /* GET */, (uint8_t)(index >> 8 & 0x7f), (uint8_t)index};
    memcpy(data + 4, &index, 4);
    memcpy(data + 8, options, options_size);
    post(index, data, 8 + options_size);
}

/* Keeps the window of registrations full, and repeats what was not answered. */
static void ask_on(int64_t now)
{
    for (unsigned i = 0; i < in_flight;) {
        struct observer *observer = &observers[window[i]];
        if (!observer->registered && !observer->refused && now >= observer->deadline)
            ask(window[i], now);
        if (observer->registered || observer->refused)
            window[i] = window[--in_flight];
        else
            i++;
    }
    for (; in_flight < WINDOW && next_observer < asked.observers; in_flight++) {
        window[in_flight] = next_observer++;
        ask(window[in_flight], now);
    }
}

/* ---- Receiving ------------------------------------------------------------------------------- */

/* Finds the payload. Returns NULL: malformed, or options longer than any that are expected. */
static const uint8_t *payload_of(const uint8_t *at, const uint8_t *stop, bool *observed)
{
    unsigned number = 0;
    while (at < stop && *at != 0xff) {
        unsigned delta = *at >> 4, size = *at & 15;
        at++;
        if (delta > 13 || size > 13 || stop - at < (delta == 13) + (size == 13))
            return NULL;
        number += delta == 13 ? 13u + *at++ : delta;
        size = size == 13 ? 13u + *at++ : size;
        if (stop - at < (int)size)
            return NULL;
        at += size;
        *observed |= number == OBSERVE;
    }
    return at < stop ? at + 1 : at;
}

static void answered(struct observer *observer, bool good, const uint8_t *payload, size_t size)
{
    if (observer->registered || observer->refused)
        return;
    observer->registered = good;
    observer->refused = !good;
    counted.refused += !good;
    if (!good)
        return;
    if (!counted.registered++)
        memcpy(before, payload, before_size = size);
    else if (size != before_size || memcmp(payload, before, size))
        errx(1, "the state changed before all had registered");
    counted.living += !observer->dead;
}

static void told(struct observer *observer, uint16_t id, bool is_acknowledged)
{
    counted.repeated += observer->heard && id == observer->last_id;
    counted.twice += observer->heard && id != observer->last_id;
    observer->heard = true;
    observer->last_id = id;
    if (!observer->told && is_acknowledged) {
        observer->told = now_ns();
        counted.told++;
    }
}

static void take(unsigned index, const uint8_t *data, size_t size)
{
    struct observer *observer = &observers[index];
    const uint8_t *stop = data + size, *payload = NULL;
    bool observed = false;
    if (size >= 8 && (data[0] & 0xcf) == 0x44 && !memcmp(data + 4, &index, 4) && data[1] >= 64)
        payload = payload_of(data + 8, stop, &observed);
    if (!payload)
        return (void)counted.strays++;
    if (is_lost(index) || (observer->registered && observer->dead))
        return;
    unsigned kind = data[0] >> 4 & 3;
    bool good = data[1] >> 5 == 2 && observed;
    size = (size_t)(stop - payload);
    if (kind == ACK)
        return answered(observer, good, payload, size);
    if (!observer->registered) /* the answer was lost: it will ask again */
        return (void)counted.strays++;
    bool is_acknowledged
        = kind == NON || post(index, (uint8_t[]){0x40 | ACK << 4, 0, data[2], data[3]}, 4);
    if (!good)
        counted.strays++;
    else if (size == before_size && !memcmp(payload, before, size))
        counted.old++;
    else
        told(observer, (uint16_t)(data[2] << 8 | data[3]), is_acknowledged);
}

/* Takes what waits at a socket, up to some datagrams. */
static void receive(unsigned number)
{
    for (int i = 0; i < BATCH; i++) {
        uint8_t data[DATAGRAM];
        struct sockaddr_in from;
        _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(struct in_pktinfo))];
        struct iovec part = {.iov_base = data, .iov_len = sizeof data};
        struct msghdr header = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part,
                                .msg_iovlen = 1, .msg_control = control,
                                .msg_controllen = sizeof control};
        ssize_t size = recvmsg(sockets[number], &header, MSG_DONTWAIT);
        if (size < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (size < 0)
            err(1, "recvmsg");
        struct in_pktinfo to = {0};
        if (CMSG_FIRSTHDR(&header) && from.sin_port == server.sin_port)
            memcpy(&to, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof to);
        uint64_t index = (uint64_t)(ntohl(to.ipi_addr.s_addr) - NET) * SOCKETS + number;
        if (index < asked.observers)
            take((unsigned)index, data, (size_t)size);
        else
            counted.strays++;
    }
}

/* ---- Running --------------------------------------------------------------------------------- */

static bool all_answered(void)
{
    return counted.registered + counted.refused == asked.observers;
}

static bool all_told(void)
{
    return counted.told == counted.living;
}

/* Sends and receives until a condition, if any, holds, but no longer than some time. */
static void until(bool (*holds)(void), int64_t at_most)
{
    struct pollfd polled[SOCKETS];
    for (unsigned i = 0; i < SOCKETS; i++)
        polled[i] = (struct pollfd){.fd = sockets[i], .events = POLLIN};
    int64_t now = now_ns(), end = now + at_most;
    for (; now < end && !(holds && holds()); now = now_ns()) {
        ask_on(now);
        poll(polled, SOCKETS, 10);
        for (unsigned i = 0; i < SOCKETS; i++)
            if (polled[i].revents)
                receive(i);
    }
}

static void run(void)
{
    int64_t start = now_ns();
    until(all_answered, asked.duration);
    if (!all_answered())
        errx(1, "only %u of %u registrations were answered", counted.registered + counted.refused,
             asked.observers);
    printf("{\"registered\": %u, \"refused\": %u, \"seconds\": %.6f}\n", counted.registered,
           counted.refused, (double)(now_ns() - start) / (double)NS);
    until(all_told, asked.duration);
    printf("{\"living\": %u, \"told_ns\": [", counted.living);
    for (unsigned i = 0, n = 0; i < asked.observers; i++)
        if (observers[i].told)
            printf("%s%lld", n++ ? ", " : "", (long long)observers[i].told);
    printf("]}\n");
    until(NULL, asked.quiet);
    printf("{\"twice\": %u, \"repeated\": %u, \"old\": %u, \"strays\": %u, \"lost\": %u, "
           "\"cpu_s\": %.3f}\n", counted.twice, counted.repeated, counted.old, counted.strays,
           counted.lost, (double)clock() / CLOCKS_PER_SEC);
}

static double number(const char *text, double low, double high)
{
    char *rest;
    double value = strtod(text, &rest);
    if (rest == text || *rest || !(value >= low && value <= high))
        errx(1, "%s: must be a number from %g to %g", text, low, high);
    return value;
}

int main(int count, char **arguments)
{
    for (int option; (option = getopt(count, arguments, "n:l:d:s:t:q:")) != -1;)
        switch (option) {
        case 'n': asked.observers = (unsigned)number(optarg, 1, MOST_OBSERVERS); break;
        case 'l': asked.loss = number(optarg, 0, 50); break;
        case 'd': asked.dead = number(optarg, 0, 100); break;
        case 's': asked.seed = (uint64_t)number(optarg, 0, 1e9); break;
        case 't': asked.duration = (int64_t)(number(optarg, 0.1, MOST_SECONDS) * 1e9); break;
        case 'q': asked.quiet = (int64_t)(number(optarg, 0, 60) * 1e9); break;
        default: return 2;
        }
    if (count - optind != 3)
        errx(1, "HOST, PORT and OPTIONS are needed");
    server = (struct sockaddr_in){.sin_family = AF_INET};
    if (inet_pton(AF_INET, arguments[optind], &server.sin_addr) != 1
        || ntohl(server.sin_addr.s_addr) >> 24 != 127)
        errx(1, "%s: not an address of 127.0.0.0/8", arguments[optind]);
    server.sin_port = htons((uint16_t)number(arguments[optind + 1], 1, 65535));
    const char *digits = arguments[optind + 2];
    options_size = strlen(digits) / 2;
    if (strlen(digits) % 2 || options_size > MOST_OPTIONS
        || strspn(digits, "0123456789abcdef") != strlen(digits))
        errx(1, "%s: must be options in hexadecimal digits, at most %d", digits, 2 * MOST_OPTIONS);
    for (size_t i = 0; i < options_size; i++)
        sscanf(digits + 2 * i, "%2hhx", &options[i]);
    observers = calloc(asked.observers, sizeof *observers);
    if (!observers)
        err(1, "memory");
    for (unsigned i = 0; i < asked.observers; i++)
        observers[i].dead = chance(i, 0) < asked.dead;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    open_sockets();
    run();
}
